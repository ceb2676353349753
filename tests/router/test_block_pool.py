"""Blocks change hands without loss, and content is found exactly as long as it is there."""

import pytest

from router.block_pool import BLOCK_SIZE, BlockPool
from router.prefix_hash import extend_block_hashes_


def hashes_of(token_ids: list[int], salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes_(hashes, token_ids, salt)
    return hashes


def published(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Blocks with these contents, held."""
    block_ids = pool.allocate(len(hashes))
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.publish(block_id, block_hash)
    return block_ids


def test_a_hash_depends_on_all_tokens_up_to_the_one_behind_the_block_and_on_the_salt() -> None:
    tokens = list(range(3 * BLOCK_SIZE + 1))
    hashes = hashes_of(tokens)
    assert len(hashes) == 3 and len(set(hashes)) == 3
    for changed, num_equal in ((0, 0), (BLOCK_SIZE - 1, 0), (BLOCK_SIZE, 0), (BLOCK_SIZE + 1, 1), (3 * BLOCK_SIZE, 2)):
        other = hashes_of([*tokens[:changed], 999, *tokens[changed + 1 :]])
        assert [a == b for a, b in zip(hashes, other, strict=True)] == [True] * num_equal + [False] * (3 - num_equal)
    assert not set(hashes) & set(hashes_of(tokens, salt="another tenant"))


def test_a_block_has_no_hash_before_the_token_behind_it_is_known() -> None:
    assert len(hashes_of(list(range(2 * BLOCK_SIZE)))) == 1
    hashes = hashes_of(list(range(BLOCK_SIZE + 1)))
    extend_block_hashes_(hashes, list(range(2 * BLOCK_SIZE + 1)), "")  # grown, not made anew
    assert hashes == hashes_of(list(range(2 * BLOCK_SIZE + 1)))


def test_released_content_is_found_again_and_shared() -> None:
    pool = BlockPool(4)
    hashes = hashes_of(list(range(2 * BLOCK_SIZE + 1)))
    first = published(pool, hashes)
    pool.release(first)
    assert (pool.num_free, pool.num_idle) == (4, 2)
    found = pool.find(hashes)
    assert found == first and pool.count_idle(found) == 2
    pool.hold(found)
    pool.hold(pool.find(hashes))
    assert (pool.num_free, pool.num_idle) == (2, 0)
    pool.check_integrity([found, found])
    pool.release(found)
    assert pool.num_free == 2  # the other still holds them
    pool.release(found)
    assert pool.num_free == 4


def test_idle_blocks_go_least_recently_used_first_and_from_the_end_of_a_sequence() -> None:
    pool = BlockPool(4)
    old, new = hashes_of([1] * (2 * BLOCK_SIZE + 1)), hashes_of([2] * (2 * BLOCK_SIZE + 1))
    old_ids, new_ids = published(pool, old), published(pool, new)
    pool.release(old_ids)
    pool.release(new_ids)
    assert pool.allocate(1) == [old_ids[1]]
    assert pool.find(old) == [old_ids[0]]
    assert pool.allocate(1) == [old_ids[0]]
    assert pool.find(old) == [] and pool.find(new) == new_ids


def test_a_second_block_with_the_same_content_is_not_kept() -> None:
    pool = BlockPool(4)
    hashes = hashes_of([1] * (BLOCK_SIZE + 1))
    first, second = published(pool, hashes), published(pool, hashes)
    assert pool.find(hashes) == first
    pool.release(second)
    assert pool.num_idle == 0
    pool.release(first)
    assert pool.num_idle == 1
    pool.check_integrity([])


def test_more_blocks_than_are_free_are_refused() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks of a pool with 2 free ones"):
        pool.allocate(3)


def test_integrity_names_a_block_that_was_released_twice_and_one_that_nobody_holds() -> None:
    pool = BlockPool(2)
    block_ids = pool.allocate(1)
    with pytest.raises(RuntimeError, match=f"block {block_ids[0]} counts 1 holders and has 0"):
        pool.check_integrity([])
    pool.release(block_ids)
    pool.release(block_ids)
    with pytest.raises(RuntimeError, match=f"block {block_ids[0]} "):
        pool.check_integrity([])
