/* What processes do after a failure (xla_ffi/engine/cuda/processes.h, Settle), small enough to try
 * every interleaving. handshake.pml has the devices' part in full; here a run is one call, and what a
 * device writes on all boards is one step.
 *
 * PROCESSES processes of one device each execute a program EXECUTIONS times; a host may be up to
 * AHEAD runs ahead of its device. Up to TIMEOUTS waits on devices may give up though every peer is on
 * its way (a late one), up to BAD_INDICES runs find an index that does not exist. A device that
 * enters gives up where nothing else can happen: its peer never comes. One that leaves has peers that
 * entered, so they leave or fail.
 *
 * Checked: every process comes to its end (no invalid end states), and the assertions below:
 *   same run   a device that succeeds read operands of its own run, all the time,
 *   no lost    after a failed run no later run succeeds on any device before every process has
 *              raised the failure,
 *   recovery   once all have raised it, runs succeed again while nobody is late, no index is bad
 *              and no process has ended.
 *
 * Each MUTANT_* takes one rule away; the search must then find an error.
 */
#ifndef PROCESSES
#define PROCESSES 2
#endif
#ifndef EXECUTIONS
#define EXECUTIONS 4
#endif
#ifndef AHEAD
#define AHEAD 1
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 1
#endif
#ifndef BAD_INDICES
#define BAD_INDICES 0
#endif

/* A failure raises at most one execution more in each process, so as many can be settled. */
#define FAILURES (EXECUTIONS + 1)

/* Devices: the slot of rank r on board b; `left` is twice the run, plus one where it failed. */
#define AT(b, r) ((b) * PROCESSES + (r))
byte entered[PROCESSES * PROCESSES];
byte left[PROCESSES * PROCESSES];
byte news[PROCESSES];    /* the last run that any device said to have failed */
byte record[PROCESSES];  /* the last run that failed here, for the host */
byte operand[PROCESSES]; /* the run whose operand the stage holds, 0: something else's */

chan queue[PROCESSES] = [AHEAD] of { byte, byte }; /* run, settled */
byte ended[PROCESSES];                             /* runs of a device that have ended */

/* The store: how far each process had come at each failure, plus one; 0: not told. */
byte told_run[PROCESSES * FAILURES];
#define TOLD(p, failure) told_run[(p) * FAILURES + (failure)]

byte timeouts = TIMEOUTS;
byte bad_indices = BAD_INDICES;
byte gone; /* processes that execute no more */

/* What the assertions look at: the first run that failed and that not all have raised. */
byte failed_run;
byte settled_run; /* failures up to this run belong to what was raised */
bool excused;     /* somebody was late, or an index bad, since all raised */

inline note_failure(n) {
  d_step {
    if
    :: n > settled_run && failed_run == 0 ->
      assert(excused || gone > 0); /* recovery */
      failed_run = n
    :: n > settled_run && n < failed_run -> failed_run = n
    :: else
    fi
  }
}

inline note_success(n) {
  assert(failed_run == 0 || n <= failed_run) /* no lost */
}

proctype Device(byte me) {
  byte n, settled, p;
  bool failed, wrong;

  do
  :: queue[me] ? n, settled ->
    failed = false;
    wrong = false;
    operand[me] = n;
    if
    :: news[me] > settled -> failed = true; goto mark
    :: else
    fi;
    p = 0;
    d_step { for (p : 0 .. PROCESSES - 1) { entered[AT(p, me)] = n } p = 0 }
    for (p : 0 .. PROCESSES - 1) {
      if
      :: p == me
      :: p != me && (entered[AT(me, p)] > n || left[AT(me, p)] / 2 > n ||
                     left[AT(me, p)] == 2 * n + 1) -> failed = true; goto mark
      :: p != me && entered[AT(me, p)] == n && left[AT(me, p)] / 2 <= n &&
         left[AT(me, p)] != 2 * n + 1
      :: atomic { p != me && timeouts > 0 -> timeouts--; excused = true; failed = true; goto mark }
      :: timeout -> failed = true; goto mark
      fi
    }
    p = 0;
    d_step { for (p : 0 .. PROCESSES - 1) { wrong = wrong || operand[p] != n } p = 0 }
    if
    :: true
    :: atomic { bad_indices > 0 -> bad_indices--; excused = true; failed = true; goto mark }
    fi;
    p = 0;
    d_step {
      for (p : 0 .. PROCESSES - 1) {
        wrong = wrong || operand[p] != n;
        left[AT(p, me)] = 2 * n
      }
      p = 0
    }
    for (p : 0 .. PROCESSES - 1) {
      if
      :: p == me
      :: p != me && (left[AT(me, p)] / 2 > n || left[AT(me, p)] == 2 * n + 1) ->
        failed = true; goto mark
      :: p != me && left[AT(me, p)] == 2 * n
      :: atomic { p != me && timeouts > 0 -> timeouts--; excused = true; failed = true; goto mark }
      fi
    }
mark:
    if
    :: failed ->
      note_failure(n);
      p = 0;
      d_step {
        for (p : 0 .. PROCESSES - 1) {
          left[AT(p, me)] = 2 * n + 1;
#ifndef MUTANT_NO_NEWS
          if
          :: news[p] < n -> news[p] = n
          :: else
          fi
#endif
        }
        p = 0
      }
      record[me] = n
    :: else ->
      assert(!wrong); /* same run */
      note_success(n)
    fi;
    d_step {
      operand[me] = 0;
      failed = false;
      wrong = false;
      p = 0;
      ended[me] = n
    }
  :: ended[me] == 255 -> break
  od
}

proctype Host(byte me) {
  byte execution, last, last_run, launched, settled, reported, failures, farthest, p, i;
  bool told, start;

  do
  :: execution == EXECUTIONS -> break
  :: execution < EXECUTIONS ->
    execution++;
    start = true;

    /* Settle */
    if
    :: told ->
      farthest = last_run;
      for (p : 0 .. PROCESSES - 1) {
#ifndef MUTANT_NO_WAIT
        if
        :: TOLD(p, failures) > 0
        :: timeout -> start = false /* who is gone is named; told again at the next execution */
        fi;
#endif
        if
        :: TOLD(p, failures) > farthest + 1 -> farthest = TOLD(p, failures) - 1
        :: else
        fi
      }
      p = 0;
#ifdef MUTANT_OWN_NUMBER
      farthest = last_run;
#endif
      if
      :: start ->
        d_step {
          failures++;
          told = false;
          settled = farthest;
          last_run = farthest;
          last = farthest;
          if
          :: reported < settled -> reported = settled
          :: else
          fi
        }
      :: else
      fi;
      farthest = 0
    :: else
    fi;

    /* Take a failure and tell it, or start the run. */
    if
    :: d_step {
        start && record[me] > reported ->
        start = false;
        reported = record[me];
        TOLD(me, failures) = last_run + 1;
        told = true;
        /* Once all have told it, what was started until then belongs to it. */
        i = 0;
        do
        :: i < PROCESSES && TOLD(i, failures) > 0 -> i++
        :: else -> break
        od;
        if
        :: i == PROCESSES ->
          failed_run = 0;
          excused = false;
          i = 0;
          do
          :: i < PROCESSES ->
            if
            :: TOLD(i, failures) > settled_run + 1 -> settled_run = TOLD(i, failures) - 1
            :: else
            fi;
            i++
          :: else -> break
          od
        :: else
        fi;
        i = 0
      }
    :: else
    fi;
    last++;
    if
    :: start ->
      last_run = last;
      launched = last;
      queue[me] ! last, settled;
      if
      :: ended[me] == last /* waits for its results, */
      :: true              /* or does not */
      fi
    :: else
    fi
  od;
  gone++;
  (launched == 0 || ended[me] == launched);
  ended[me] = 255
}

init {
  atomic {
    byte p = 0;
    do
    :: p < PROCESSES -> run Device(p); run Host(p); p++
    :: p == PROCESSES -> break
    od
  }
}
