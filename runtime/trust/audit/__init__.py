"""The audit log: `writer` appends, `reader` checks, shows and erases, `chain` is the format that both know."""
