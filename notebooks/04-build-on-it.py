# %% [markdown]
# # Build on it
#
# A bigram subnetwork sees only the current token. On random tokens that repeat, it cannot know what comes next, while
# the full model can: it looks back to the last occurrence of this token (*induction*; Olsson et al.
# [2022](https://arxiv.org/abs/2209.11895)). Which attention heads must be added to the subnetwork for that?

# %%
import bigram_circuits as bc
from bigram_circuits import analysis

model = bc.load_model("reference")
corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
recipe = bc.SparsifyConfig(beta_growth=1.05)
found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/first")  # read, if it is there already
bigram = found.subnetwork
bigram

# %% [markdown]
# ## The task
#
# Random tokens, then the same again. Only the repetition counts.

# %%
task = analysis.repeated_random_tokens(model, prompts=16, period=24)
able = analysis.ability(model, task)
print(f"the full model: {able.loss:.2f} nats per token; guessing among all tokens: {able.chance:.2f}")

# %% [markdown]
# ## One head at a time
#
# Every head in turn is added to the subnetwork, with all of its weights. The bars show by how much the loss falls.

# %%
single = bc.sufficiency(model, bigram, "heads", task, seeds=1)
single.plot()

# %% [markdown]
# One head helps by itself; no head solves the task. Does a second one help the first?

# %%
best, _ = single.top(1)[0]
others = [head for head in single.names if head != best]
pairs = bc.sufficiency(model, bigram, [f"{best} + {head}" for head in others], task, seeds=1)
pairs.plot()

# %%
together, fall = pairs.top(1)[0]
partner = together.removeprefix(f"{best} + ")
alone = single.get("fall_in_loss")
print(f"{best} alone: {alone[best]:.2f} nats; {partner} alone: {alone[partner]:.2f} nats; together: {fall:.2f} nats")
print(f"as many random weights as in both: {pairs.get('random_fall')[together]:.2f} nats")
print(f"loss of the subnetwork with both: {pairs.get('loss')[together]:.2f} nats; of the full model: {able.loss:.2f}")

# %% [markdown]
# Together they do far more than the sum of what each does alone: they form a circuit. It does not reach the full
# model, so more parts than these two heads are involved. Where do they attend?

# %%
heads = [tuple(int(number) for number in head.removeprefix("L").split("H")) for head in (best, partner)]
short = analysis.repeated_random_tokens(model, prompts=1, period=9)
analysis.attention_patterns(model, prompt=short.tokens[0], heads=heads).plot()

# %% [markdown]
# Each row is a position, and its bright cell is where the head attends from there. The head in the earlier layer
# attends to the previous token. The one in the later layer, once the tokens repeat, attends to the token *after* the
# last occurrence of the current one: the answer. The first writes "what came before me" into every position, and the
# second searches for it.
#
# ## Subnetworks are values
#
# A subnetwork with the heads added is a value too: it can be combined and saved.

# %%
both = bigram
for layer, head in heads:
    both = both.add_head(layer, head)
both.save("runs/bigram-and-induction.safetensors")
both

# %% [markdown]
# ## Your model
#
# Change these lines; everything else stays the same. `analysis.TASKS` has more tasks (indirect objects, greater-than,
# ordered sequences, a value listed earlier); each generates prompts for your tokenizer, or reports that it cannot.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)
# recipe = bc.SparsifyConfig()
# found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/pythia-70m")
# ```
