"""Data to modules: task and general-knowledge training, resumable to the same bits."""
