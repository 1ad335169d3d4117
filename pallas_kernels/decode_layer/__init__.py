"""What a decode step does between the matrix products of a layer."""
