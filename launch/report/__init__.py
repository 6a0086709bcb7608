"""What runs and sweeps have shown: pages, files of figures and tables, and the ledger."""
