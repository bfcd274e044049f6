"""Many machines, by Ray: jobs over actors that hold an engine each, and replicas behind one server."""
