"""One update of SAMI on your own model and principles, with `repro` as a library: answer, score, train, score again.

Run: .venv/bin/python experiments/library.py [MODEL]; a folder or hub name, by default the embedded model. The loop with
all its iterations, checks and files is `repro.run(repro.Experiment(...))`, or an experiment file.
"""

import sys

import torch

import repro
from repro.config import EMBEDDED

PRINCIPLES = (repro.Principle(name="short", text="Answer in one short sentence.", antithesis="Answer at length."),
              repro.Principle(name="plain", text="Use everyday words.", antithesis="Use scientific words."))
QUERIES = ("How do I keep basil alive indoors?", "Why does bread rise?", "What is a good first bird to learn?",
           "How can I remember names?", "Why do my glasses fog up?", "How do I fold a fitted sheet?")


def main(name: str) -> None:
    model, tokenizer = repro.load_model(name), repro.load_tokenizer(name)
    constitutions = [repro.Constitution(principles=PRINCIPLES, sides=sides) for sides in ((True, True), (False, True))]

    def prompt(query: str, constitution: repro.Constitution) -> str:
        text = "\n\n".join((query, "\n".join(constitution.statements())))
        if tokenizer.chat_template is None:
            return f"{text}\n\nAnswer:"
        turns = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    prompts = [[prompt(query, c) for c in constitutions] for query in QUERIES]
    every, answers = [p for row in prompts for p in row], {}
    for batch, found in repro.sample_responses(model, tokenizer, every, max_new_tokens=40):
        answers |= zip(batch, (a["text"] for a in found))
    C = len(constitutions)
    responses = [[answers[C * k + c] for c in range(C)] for k in range(len(QUERIES))]
    kept = [k for k, row in enumerate(responses) if all(row) and len(set(row)) == C]  # alike, they teach nothing

    def matrix() -> torch.Tensor:  # log-probs [B, C, R] of every response under every constitution
        return repro.logprob_matrix(model, tokenizer, [prompts[k] for k in kept], [responses[k] for k in kept],
                                    length_normalize=True, score_eos=False)

    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-6)
    loss = repro.symmetric_infonce(matrix())
    loss.backward()
    with torch.no_grad():
        before = repro.mutual_information(matrix().numpy())
        optimizer.step()
        after = repro.mutual_information(matrix().numpy())
    print(f"{len(kept)} of {len(QUERIES)} queries; loss {loss.item():.3f}; bound {before.value:.3f} -> {after.value:.3f} "
          f"nats on the same responses (n {after.n}; they were trained on)")


if __name__ == "__main__":
    main(*sys.argv[1:] or [EMBEDDED])
