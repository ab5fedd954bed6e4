"""Where am I, who starts me. The door (``cli``), the launcher (``local``), the bootstrap of a rank (``worker``).

The only room that reads the environment, and the only one that imports the observer.
"""
