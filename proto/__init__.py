"""The wire format `motet.v1`: protocol buffers and their generated stubs."""
