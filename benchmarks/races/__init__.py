"""One file a race, or a few races of one kind."""
