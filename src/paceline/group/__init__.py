"""Who is in the group, and how bytes get from one to the other."""
