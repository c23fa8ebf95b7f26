"""Image and text towers: native ones, those of other libraries, their weights, and the teacher."""
