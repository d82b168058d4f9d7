"""qianmo: one trained model that serves a thousand tasks, scenes and domains.

Every model is one road, `encode -> embed -> bottom -> tower`, with two seams: between ids and
vectors (embeddings deployed apart) and between the hidden state and the logits (towers that adapt).
"""

__version__ = "0.1.0"
