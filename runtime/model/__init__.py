"""What a model is: its configuration, families, rotary tables, and the bundle that holds it."""
