"""Find and understand subnetworks of transformer language models.

Load a model and a text, count the n-gram target, find the weights that reproduce it, and check what was found:

    model  = bc.load_model("reference")
    corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
    target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
    found  = bc.find_subnetwork(model, target, corpus)
    print(bc.evaluate(model, found.subnetwork, target, corpus.held_out))

Names are imported on first use (`__init__.pyi` says from where), so importing the package is fast.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
