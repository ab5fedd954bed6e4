"""Where the data comes from: one global order, of which every rank reads its own rows."""
