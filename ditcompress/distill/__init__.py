"""Teacher and student: the one trainer, its data and its losses."""
