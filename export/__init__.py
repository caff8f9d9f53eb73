"""From a SpeechBrain checkpoint to verified files in the Triton model repository."""
