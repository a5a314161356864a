"""Task: repair. A caption written again without what is false in it; it is asked about a text, without the image."""

from pipeline.tasks.base import Task
from pipeline.tasks.caption import Caption, tidy_caption

TASK = Task(name="repair", output=Caption, row=Caption, tidy_row=tidy_caption)
