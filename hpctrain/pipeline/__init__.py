"""Pipeline stages: schedules are generators of instructions that the engine runs."""
