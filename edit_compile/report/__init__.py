"""What users read and look at: tables, image grids, samples of teacher and student."""
