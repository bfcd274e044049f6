"""What the measurements share: probes of the machine, a timed engine, reports."""
