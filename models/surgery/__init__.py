"""Models in, other models out, that compute the same or nearly so."""
