import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from mmpretrain.evaluators.knn import knn_votes
from mmpretrain.evaluators.linear_probe import fit
from mmpretrain.evaluators.metrics import (
    accuracy,
    classification_metrics,
    confusion_matrix,
    confusion_tables,
    mean_per_class_recall,
    predictions,
    rank_of_label,
)
from mmpretrain.evaluators.retrieval import retrieval_ranks

SCORES = torch.tensor(
    [
        [0.9, 0.5, 0.1],  # label 0: right
        [0.9, 0.5, 0.1],  # label 1: second
        [0.2, 0.3, 0.1],  # label 2: third
        [0.5, 0.5, 0.1],  # label 0: ties with class 1, so it is not first
    ]
)
LABELS = torch.tensor([0, 1, 2, 0])


def test_ranks_and_predictions_by_hand():
    assert rank_of_label(SCORES, LABELS).tolist() == [0, 1, 2, 1]
    assert predictions(SCORES, LABELS).tolist() == [0, 0, 1, 1]
    assert classification_metrics(SCORES, LABELS) == {"acc1": 0.25, "acc5": 1.0, "mean_per_class_recall": pytest.approx(1 / 6)}
    assert accuracy(rank_of_label(SCORES, LABELS), 2) == 0.75


def test_a_constant_model_scores_zero_not_the_share_of_class_zero():
    metrics = classification_metrics(torch.zeros(10, 7), torch.zeros(10, dtype=torch.int64))
    assert (metrics["acc1"], metrics["acc5"]) == (0.0, 0.0)


def test_mean_per_class_recall_leaves_absent_classes_out():
    labels, predicted = torch.tensor([0, 0, 0, 3]), torch.tensor([0, 0, 3, 3])
    assert mean_per_class_recall(labels, predicted) == pytest.approx((2 / 3 + 1) / 2)


def test_confusions_by_hand():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    assert confusion_matrix(labels, predicted, 3).tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]
    tables = confusion_tables(labels, predicted, ["cat", "dog", "eel"])
    assert tables["confusions"][0] == {"true": "cat", "predicted": "dog", "count": 2, "fraction": pytest.approx(2 / 3)}
    assert [row["recall"] for row in tables["per_class"]] == pytest.approx([1 / 3, 1 / 2])
    assert tables["confusion_matrix"][0] == {"true class": "cat", "cat": 1, "dog": 2, "eel": 0}
    many = confusion_tables(torch.arange(150), torch.arange(150).roll(1), [str(i) for i in range(150)])
    assert "confusion_matrix" not in many
    assert len(many["confusions"]) == 20


# Columns are images 0..2, rows are texts; texts 0 and 1 belong to image 0, text 2 to image 1, text 3 to image 2.
#            image   0    1    2
SIMILARITY = [[0.9, 0.8, 0.1],  # rank 0
              [0.2, 0.3, 0.4],  # rank 2
              [0.5, 0.5, 0.0],  # ties with image 0: rank 1
              [0.7, 0.1, 0.6]]  # rank 1  # fmt: skip
OWNER = torch.tensor([0, 0, 1, 2])


def as_features(similarity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and texts whose dot products are the matrix: images are unit axes."""
    return torch.eye(similarity.shape[1], dtype=similarity.dtype), similarity


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_retrieval_by_hand(tile):
    image_rank, text_rank = retrieval_ranks(*as_features(torch.tensor(SIMILARITY)), OWNER, tile)
    assert image_rank.tolist() == [0, 2, 1, 1]
    # image 0: best own 0.9, nothing above; image 1: own 0.5 beaten by 0.8; image 2: own 0.6, nothing above
    assert text_rank.tolist() == [0, 1, 0]


def test_retrieval_equals_a_naive_count():
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for n in (23, 61))
    owner = torch.cat([torch.arange(23), torch.randint(23, (38,), generator=generator)])
    image_rank, text_rank = retrieval_ranks(image, text, owner, tile=7, tie=0.0)
    scores = (text @ image.T).tolist()
    for t, row in enumerate(scores):
        assert image_rank[t] == sum(score >= row[owner[t]] for i, score in enumerate(row) if i != owner[t])
    for i in range(23):
        best = max(scores[t][i] for t in range(61) if owner[t] == i)
        assert text_rank[i] == sum(scores[t][i] >= best for t in range(61) if owner[t] != i)


def test_identical_features_retrieve_nothing():
    same = normalize(torch.ones(6, 4), dim=1)
    image_rank, text_rank = retrieval_ranks(same, same, torch.arange(6), tile=4)
    assert image_rank.tolist() == text_rank.tolist() == [5] * 6


def test_an_image_without_text_ranks_last():
    _, text_rank = retrieval_ranks(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]), tile=2)
    assert text_rank.tolist() == [0, 0, 2]


def test_knn_votes_in_closed_form():
    train = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # cosines to (1, 0): 1, 0, -1
    votes = knn_votes(torch.tensor([[5.0, 0.0]]), train, torch.tensor([1, 0, 0]), 3, k=2, temperature=0.5)
    assert votes.tolist() == [[pytest.approx(torch.tensor(-2.0).exp().item()), 1.0, 0.0]]
    assert knn_votes(torch.tensor([[5.0, 0.0]]), train, torch.tensor([1, 0, 0]), 3, k=99, temperature=1e3)[0].argmax() == 0


def test_knn_votes_equal_a_naive_loop_in_any_tile():
    generator = torch.Generator().manual_seed(1)
    query, train = torch.randn(9, 5, generator=generator), torch.randn(30, 5, generator=generator)
    labels = torch.randint(4, (30,), generator=generator)
    votes = knn_votes(query, train, labels, 4, k=6, temperature=0.07, tile=4)
    for q, row in zip(query, votes, strict=True):
        cosine = torch.nn.functional.cosine_similarity(q[None], train)
        near = sorted(range(30), key=lambda j, c=cosine: -c[j])[:6]
        naive = torch.zeros(4, dtype=torch.float64)
        for j in near:
            naive[labels[j]] += ((cosine[j] - cosine[near[0]]).double() / 0.07).exp()
        torch.testing.assert_close(row, naive, atol=1e-4, rtol=1e-4)


def test_the_probe_is_scikit_learns_logistic_regression():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 4, generator=generator)
    labels = (x[:, 0] + 0.5 * torch.randn(60, generator=generator) > 0).long() + (x[:, 1] > 0.8).long()
    weight, bias = fit(x, labels, 3, c=0.5)
    reference = LogisticRegression(C=0.5, max_iter=2000, tol=1e-9).fit(x.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(x.numpy())).float()
    torch.testing.assert_close((x @ weight.T + bias).softmax(1), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_of_equally_near_rows_the_earlier_ones_vote(tile):
    train, labels = torch.ones(10, 3), torch.tensor([3, 1, 1, 0, 0, 0, 2, 2, 2, 2])
    votes = knn_votes(torch.ones(2, 3), train, labels, 4, k=3, temperature=0.1, tile=tile)
    torch.testing.assert_close(votes, torch.tensor([[0.0, 2.0, 0.0, 1.0]], dtype=torch.float64).expand(2, 4), atol=1e-5, rtol=0)


def test_a_nan_counts_against_the_model():
    nan = float("nan")
    scores = torch.tensor([[nan, nan, nan], [nan, 0.1, 0.2], [0.3, nan, 0.1], [0.9, 0.1, 0.1]])
    assert rank_of_label(scores, torch.tensor([0, 0, 0, 0])).tolist() == [2, 2, 1, 0]
    metrics = classification_metrics(scores, torch.tensor([0, 0, 0, 0]))
    assert (metrics["acc1"], metrics["mean_per_class_recall"]) == (0.25, 0.25)
    image, text = torch.eye(3), torch.eye(3)
    text[1] = nan
    assert [rank.tolist() for rank in retrieval_ranks(image, text, torch.arange(3), tile=2)] == [[0, 3, 0], [1, 3, 1]]
    assert [rank.tolist() for rank in retrieval_ranks(torch.full((3, 3), nan), text, torch.arange(3))] == [[3, 3, 3], [3, 3, 3]]
