"""How well SACV learns against SB3's SAC: tasks, sweeps of many runs, and the report."""
