"""The commands by subject. Heavy imports stand in the functions that use them: ``shoal --help`` must answer at once."""
