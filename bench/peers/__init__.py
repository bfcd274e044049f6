"""Other runtimes, measured beside Motet."""
