"""What a converted model needs in order to run, and nothing else. Imports torch and transformers, never `surgery`."""
