"""Codecs: numbers to bits and back."""
