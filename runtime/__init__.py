"""The inference runtime: request → scheduler → backend → stream, and the gRPC server around it."""
