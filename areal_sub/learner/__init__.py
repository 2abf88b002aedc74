"""The learner: from groups of rollouts to new weights. The only user is `areal_sub.trainer`.

advantage  returns of a group → group-relative advantages          pure, numpy
schedule   step → learning rate                                    pure
batch      samples → packed micro-batches within a token budget    pure
ratios     how far policies are apart, and importance weights      pure, tensors
loss       logprobs → the policy loss and its statistics           pure, tensors
model      a Hugging Face causal LM that scores trained tokens
learner    the optimizer step, and the weights' way out
checkpoint recovery points; durable: files that are there whole or not at all
"""
