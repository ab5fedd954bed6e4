"""The user's object, and the only place where placement and exchange meet."""
