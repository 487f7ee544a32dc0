"""What a run over several processes needs besides its numbers: launching them, and ending them all when one fails."""
