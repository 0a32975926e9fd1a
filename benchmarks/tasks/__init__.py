"""Questions with gold answers and fine-tuning tasks, from pinned packages; lm_eval/ has the task files."""
