"""Who a caller is, what it may do and how much, and the record of what was done. It knows no transport."""
