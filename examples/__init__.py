"""Short programs that show EDM at work: alone, or under mpirun with a DMS of its own."""
