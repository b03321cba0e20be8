"""Which samples stand in which packed sequence, for whole epochs, before the first step."""
