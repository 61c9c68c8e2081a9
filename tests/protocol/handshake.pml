/* The handshake of the CUDA engine (xla_ffi/engine/cuda/handshake_program.h), small enough to try
 * every interleaving. Names are those of the program.
 *
 * RANKS ranks run RUNS runs; run 1 has CALLS calls, the later ones have one. In run 1 up to TIMEOUTS
 * waits may give up though every rank lives (a late rank), up to SKIPS ranks may leave the run out
 * (their host failed before it came to the call) and up to BAD_INDICES calls may find an index that
 * does not exist, or hear that another call site of their run has failed. At any time up to DEATHS ranks may stop for good; from then on any wait may give
 * up. Operand memory holds the operand until its call ends, then it belongs to somebody else.
 *
 * Checked: every living rank comes to its end (no invalid end states), and the assertions below:
 *   pointers   a mover follows only pointers of its own call,
 *   data       a call that reports success read operands that were written, and valid, all the time
 *              (no early read, no late one that is taken for good, no lost error),
 *   recovery   after run 1 every call succeeds while all ranks live, without a single timeout.
 *
 * Each MUTANT_* takes one rule of the protocol away; the search must then find an error.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef RUNS
#define RUNS 2
#endif
#ifndef CALLS
#define CALLS 2
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 1
#endif
#ifndef SKIPS
#define SKIPS 0
#endif
#ifndef BAD_INDICES
#define BAD_INDICES 0
#endif
#ifndef DEATHS
#define DEATHS 0
#endif

/* Tags: run and call in one number that only grows. */
#define BASE 8
#define TAG(run, call) ((run) * BASE + (call))
#define RUN(tag) ((tag) / BASE)

/* The slot of rank `rank` on the board of rank `board`, and what it holds. `left` is twice the tag
 * that was left last, plus one where that call failed. */
#define AT(board, rank) ((board) * RANKS + (rank))
byte entered[RANKS * RANKS];
byte left[RANKS * RANKS];
byte message[RANKS * RANKS];

byte operand[RANKS]; /* the call whose operand the memory holds, 0: something else's */

byte timeouts = TIMEOUTS;
byte skips = SKIPS;
byte bad_indices = BAD_INDICES;
byte deaths = DEATHS;

#define MAY_GIVE_UP ((round == 1 && timeouts > 0) || deaths < DEATHS)
#define GIVE_UP                                                    \
  if                                                               \
  :: round == 1 && timeouts > 0 && deaths == DEATHS -> timeouts--    \
  :: else                                                          \
  fi;                                                              \
  failed = true

/* Takes effect between any two steps that others can see. */
#if DEATHS > 0
#define MAY_DIE                                        \
  if                                                   \
  :: true                                              \
  :: atomic { deaths > 0 -> deaths--; goto dead }      \
  fi
#else
#define MAY_DIE skip
#endif

#define FAILED(word) ((word) % 2 == 1)

/* What Enter makes of a peer's slot, and Leave. */
#define ENTER_FAILS(p)                                                             \
  (RUN(entered[AT(me, p)]) > RUN(tag) || RUN(left[AT(me, p)] / 2) > RUN(tag) ||    \
   (FAILED(left[AT(me, p)]) && RUN(left[AT(me, p)] / 2) == RUN(tag)) ||            \
   entered[AT(me, p)] > tag)
#define ENTER_READY(p) (entered[AT(me, p)] == tag)
#ifdef MUTANT_NO_LEAVE_CHECK
#define LEAVE_FAILS(p) false
#define LEAVE_READY(p) (left[AT(me, p)] / 2 >= tag)
#else
#define LEAVE_FAILS(p)                           \
  (RUN(left[AT(me, p)] / 2) > RUN(tag) ||        \
   (FAILED(left[AT(me, p)]) && RUN(left[AT(me, p)] / 2) == RUN(tag) && left[AT(me, p)] / 2 <= tag))
#define LEAVE_READY(p) (left[AT(me, p)] / 2 >= tag && !LEAVE_FAILS(p))
#endif

#define FOR_PEERS(p)     \
  p = 0;                 \
  do                     \
  :: p == me -> p++      \
  :: p < RANKS && p != me ->

#define END_PEERS(p)     \
    p++                  \
  :: p == RANKS -> break \
  od;                    \
  p = 0

proctype Rank(byte me) {
  byte round, call, tag, truth, p;
  byte copy[RANKS];
  bool failed, failed_run, marked, wrong;
#ifdef MUTANT_OWN_GENERATION
  byte generation = 1;
  byte epoch;
#endif

  round = 1;
  do
  :: round > RUNS -> break
  :: round <= RUNS ->
#ifndef MUTANT_OWN_GENERATION
    failed_run = false;
    marked = false;
#endif
    call = 1;
    if
    :: true
    :: atomic { round == 1 && skips > 0 -> skips--; call = BASE }
    fi;
    do
    :: (round == 1 && call > CALLS) || (round > 1 && call > 1) -> break
    :: else ->
      d_step {
        truth = TAG(round, call); /* the same on all ranks that are at this call */
#ifdef MUTANT_OWN_GENERATION
        if
        :: failed_run -> generation++; epoch = 0; failed_run = false; marked = false
        :: else
        fi;
        epoch++;
        tag = TAG(generation, epoch);
#else
        tag = truth;
#endif
        failed = false;
        wrong = false;
        operand[me] = truth
      }

      /* Enter */
#ifndef MUTANT_NO_FAIL_FAST
      if
      :: failed_run -> failed = true; goto enter_failed
      :: !failed_run
      :: atomic { !failed_run && round == 1 && bad_indices > 0 -> bad_indices--; failed = true; goto enter_failed }
      fi;
#endif
      FOR_PEERS(p)
        MAY_DIE;
#ifdef MUTANT_TAG_FIRST
        entered[AT(p, me)] = tag;
        message[AT(p, me)] = truth;
#else
        message[AT(p, me)] = truth;
        entered[AT(p, me)] = tag;
#endif
      END_PEERS(p);
      MAY_DIE;
      FOR_PEERS(p)
        if
        :: ENTER_FAILS(p) -> failed = true; goto enter_failed
        :: ENTER_READY(p) && !ENTER_FAILS(p)
        :: atomic { MAY_GIVE_UP && !ENTER_READY(p) -> GIVE_UP; goto enter_failed }
        fi;
      END_PEERS(p);
      FOR_PEERS(p)
        copy[p] = message[AT(me, p)];
#ifndef MUTANT_NO_SECOND_LOOK
        if
        :: ENTER_FAILS(p) -> failed = true; goto enter_failed
        :: else
        fi;
#endif
      END_PEERS(p);

enter_failed:
      if
      :: failed -> goto mark
      :: else
      fi;

      /* Move: each peer's operand is read for a while. */
      MAY_DIE;
      FOR_PEERS(p)
        assert(copy[p] == truth); /* pointers */
        wrong = wrong || operand[p] != truth;
      END_PEERS(p);
      FOR_PEERS(p)
        wrong = wrong || operand[p] != truth;
      END_PEERS(p);
      if
      :: true
      :: atomic { round == 1 && bad_indices > 0 -> bad_indices--; failed = true; goto mark }
      fi;

      /* Leave */
      FOR_PEERS(p)
        MAY_DIE;
        left[AT(p, me)] = 2 * tag;
      END_PEERS(p);
#ifndef MUTANT_NO_LEAVE_WAIT
      FOR_PEERS(p)
        if
        :: LEAVE_FAILS(p) -> failed = true; goto mark
        :: LEAVE_READY(p)
        :: atomic { MAY_GIVE_UP && !LEAVE_READY(p) -> GIVE_UP; goto mark }
        fi;
      END_PEERS(p);
#endif

mark:
      p = 0;
      if
      :: failed ->
        failed_run = true;
        wrong = false;
#ifndef MUTANT_NO_MARK
#ifndef MUTANT_MARK_AGAIN
        if
        :: marked -> goto marked_before
        :: else
        fi;
#endif
        FOR_PEERS(p)
          MAY_DIE;
          left[AT(p, me)] = 2 * tag + 1;
        END_PEERS(p);
        marked = true;
marked_before:
#endif
        assert(round == 1 || deaths < DEATHS) /* recovery */
      :: else
      fi;

      /* The call ends: its result is taken, its operand's memory is used for something else. */
      d_step {
        assert(failed || !wrong); /* data */
        operand[me] = 0;
        p = 0;
        do
        :: p < RANKS -> copy[p] = 0; p++
        :: else -> break
        od;
        p = 0;
        wrong = false;
        failed = false;
        call++
      }
    od;
    round++
  od;
  goto ended;
dead:
  skip;
ended:
  skip
}

init {
  atomic {
    byte r = 0;
    do
    :: r < RANKS -> run Rank(r); r++
    :: r == RANKS -> break
    od
  }
}
