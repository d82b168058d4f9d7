"""The programs: prepare, train, evaluate, export, serve, predict."""
