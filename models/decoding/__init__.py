"""Generation: drawing tokens from a trunk."""
