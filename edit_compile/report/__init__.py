"""What users read: tables, image grids."""
