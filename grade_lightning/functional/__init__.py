"""The mathematics: tensors in, tensors out. Knows torch alone.

Letters in shapes: b sequences, t completion tokens, l input positions, v vocabulary, w embedding width.
"""
