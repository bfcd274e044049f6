"""The backend on a GPU. Needs torch."""
