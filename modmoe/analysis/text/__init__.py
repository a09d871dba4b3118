"""From a task's file to tokens: rows, chat templates, batches."""
