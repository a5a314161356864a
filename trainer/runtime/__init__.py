"""What a training needs of its machine: devices and processes, memory, and the files of its folder."""
