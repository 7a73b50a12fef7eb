"""The paper's tables: their rows as jobs, and what came out beside what was published."""
