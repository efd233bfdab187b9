"""Where runs are kept: a folder that all nodes share, or an object store by URI."""
