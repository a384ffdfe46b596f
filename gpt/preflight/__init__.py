"""Before a run: what it will take, computed on any machine in well under a second."""
