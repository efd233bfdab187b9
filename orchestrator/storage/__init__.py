"""Storage of runs: a folder that all nodes share, or an object store by URI."""
