"""Task: covers. The answer to a question about an image from a caption of it, without the image: what does the caption tell?"""

from pipeline.tasks.answer import Answer
from pipeline.tasks.base import Task

TASK = Task(name="covers", output=Answer, row=Answer)
