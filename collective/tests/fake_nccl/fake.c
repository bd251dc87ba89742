/* A stand-in for libnccl.so.2 and libcuda.so.1 over host memory: see README.md for what it proves.
 *
 * "Device" memory is malloc. A stream is a thread that runs its queue in order, so work really is
 * asynchronous, events really are not ready for a while, and an operation really waits for peers.
 * Several ranks are threads of one process. Faults are set by fake_* functions, and by compiling
 * with FAKE_VERSION, WITHOUT_OPTIONAL or WITHOUT_SEND.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef FAKE_VERSION
#define FAKE_VERSION 23007
#endif

/* ---- one lock and one condition for everything: slow, simple, without races ---- */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static void enter(void) { pthread_mutex_lock(&lock); }
static void leave(void) { pthread_cond_broadcast(&changed); pthread_mutex_unlock(&lock); }
static void pause_locked(void) { pthread_cond_wait(&changed, &lock); }

/* ---- counters and faults, for the tests ---- */
static long counters[16];
enum { ABORTS, DESTROYS, ALLOCATIONS, FREES, REGISTERED, DEREGISTERED, LAUNCHES, GROUPS, OPERATIONS,
       USES_AFTER_END, FINALIZES, CONTEXTS, FORMINGS };
long fake_counter(int which) { enter(); long found = counters[which]; leave(); return found; }
static void count(int which) { enter(); counters[which]++; leave(); }

/* ================================ CUDA ================================ */
typedef struct Task Task;
struct Task { void (*run)(void*); void* argument; Task* next; };
typedef struct Stream { Task *first, *last; void* context; int running, ended; pthread_t thread; struct Stream* next; } Stream;
typedef struct { long recorded, done; int marks, destroyed; } Event;
static Stream* streams;
static char context_of[16];
static __thread void* current[16];
static __thread int depth;

#define NO_CONTEXT 201
#define NEED_CONTEXT if (depth == 0) return NO_CONTEXT

static void* stream_main(void* argument) {
  Stream* s = argument;
  enter();
  for (;;) {
    while (!s->first && !s->ended) pause_locked();
    if (!s->first) break;
    Task* task = s->first;
    s->running = 1;
    leave();
    task->run(task->argument);
    enter();
    s->first = task->next;
    if (!s->first) s->last = NULL;
    s->running = 0;
    free(task);
    pthread_cond_broadcast(&changed);
  }
  leave();
  return NULL;
}
static void push_locked(Stream* s, void (*run)(void*), void* argument) {
  Task* task = calloc(1, sizeof *task);
  task->run = run;
  task->argument = argument;
  if (s->last) s->last->next = task; else s->first = task;
  s->last = task;
}
static void push(Stream* s, void (*run)(void*), void* argument) {
  enter(); push_locked(s, run, argument); leave();
}

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuGetErrorName(int code, const char** text) { *text = code == NO_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int code, const char** text) { (void)code; *text = "the fake driver refuses"; return 0; }
int cuDeviceGetCount(int* count) { *count = 8; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetUuid_v2(unsigned char* uuid, int device) { memset(uuid, device + 1, 16); return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { count(CONTEXTS); *context = &context_of[device]; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; enter(); counters[CONTEXTS]--; leave(); return 0; }
int cuCtxPushCurrent_v2(void* context) { current[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(void** context) { NEED_CONTEXT; *context = current[--depth]; return 0; }
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  NEED_CONTEXT; if (!bytes) return 1;
  void* found = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(found, 0xa5, bytes);
  count(ALLOCATIONS); *address = (uint64_t)found; return 0;
}
int cuMemFree_v2(uint64_t address) { NEED_CONTEXT; count(FREES); free((void*)address); return 0; }
int cuMemHostAlloc(void** start, size_t bytes, unsigned flags) {
  (void)flags; uint64_t address; int code = cuMemAlloc_v2(&address, bytes); if (!code) *start = (void*)address; return code;
}
int cuMemFreeHost(void* start) { return cuMemFree_v2((uint64_t)start); }

typedef struct { void* to; const void* from; size_t bytes; } Copy;
static void run_copy(void* argument) { Copy* c = argument; memmove(c->to, c->from, c->bytes); free(c); }
static int copy(void* to, const void* from, size_t bytes, Stream* s) {
  NEED_CONTEXT; if (!bytes) return 1;
  Copy* c = malloc(sizeof *c); *c = (Copy){to, from, bytes}; push(s, run_copy, c); return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* s) { return copy((void*)to, from, bytes, s); }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* s) { return copy(to, (void*)from, bytes, s); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* s) { return copy((void*)to, (void*)from, bytes, s); }

int cuStreamCreate(Stream** stream, unsigned flags) {
  NEED_CONTEXT; if (flags != 1) return 1;
  Stream* s = calloc(1, sizeof *s);
  s->context = current[depth - 1];
  enter(); s->next = streams; streams = s; leave();
  pthread_create(&s->thread, NULL, stream_main, s);
  pthread_detach(s->thread);
  *stream = s; return 0;
}
/* Leaks the stream, so that a late look at it is no fault of the fake. */
int cuStreamDestroy_v2(Stream* s) { enter(); s->ended = 1; leave(); return 0; }
int cuStreamQuery(Stream* s) { enter(); int busy = s->first != NULL; leave(); return busy ? 600 : 0; }

int cuEventCreate(Event** event, unsigned flags) { NEED_CONTEXT; (void)flags; *event = calloc(1, sizeof **event); return 0; }
int cuEventDestroy_v2(Event* e) { enter(); e->destroyed = 1; leave(); return 0; }
typedef struct { Event* event; long number; } Mark;
static void run_mark(void* argument) {
  Mark* m = argument; enter(); m->event->done++; (void)m->number; leave(); free(m);
}
static void mark_locked(Event* e, Stream* s) {
  Mark* m = malloc(sizeof *m); m->event = e; m->number = ++e->recorded; push_locked(s, run_mark, m);
}
static void run_await(void* argument) {
  Mark* m = argument; enter(); while (m->event->done < m->number) pause_locked(); leave(); free(m);
}
static void await_locked(Event* e, Stream* s) {
  Mark* m = malloc(sizeof *m); m->event = e; m->number = e->recorded; push_locked(s, run_await, m);
}
int cuEventRecord(Event* e, Stream* s) { enter(); mark_locked(e, s); leave(); return 0; }
int cuEventQuery(Event* e) { enter(); int ready = e->done >= e->recorded; leave(); return ready ? 0 : 600; }
int cuStreamWaitEvent(Stream* s, Event* e, unsigned flags) { (void)flags; enter(); await_locked(e, s); leave(); return 0; }
#ifndef WITHOUT_OPTIONAL
int cuCtxRecordEvent(void* context, Event* e) {
  enter(); for (Stream* s = streams; s; s = s->next) if (!s->ended && s->context == context) mark_locked(e, s); leave(); return 0;
}
int cuCtxWaitEvent(void* context, Event* e) {
  enter(); for (Stream* s = streams; s; s = s->next) if (!s->ended && s->context == context) await_locked(e, s); leave(); return 0;
}
#endif

/* The kernels are C with the names of sum.ptx: the text itself is only looked at. */
typedef struct { const char* name; } Function;
static Function functions[] = {{"sum_f32"}, {"sum_f64"}, {"sum_i32"}, {"sum_i64"}, {"sum_u8"}, {"divide_f32"}, {"divide_f64"}};
static int kernels_refused;
void fake_refuse_kernels(int refused) { enter(); kernels_refused = refused; leave(); }
int cuModuleLoadData(void** module, const void* image) {
  NEED_CONTEXT; if (kernels_refused) return 218;
  if (!strstr(image, ".version") || !strstr(image, ".target")) return 218;
  *module = strdup(image); return 0;
}
int cuModuleUnload(void* module) { free(module); return 0; }
int cuModuleGetFunction(Function** function, void* module, const char* name) {
  char entry[64]; snprintf(entry, sizeof entry, ".entry %s(", name);
  if (!strstr(module, entry)) return 500;
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
    if (!strcmp(functions[i].name, name)) { *function = &functions[i]; return 0; }
  return 500;
}
typedef struct { Function* function; uint64_t a, b, c, n; float f; double d; } Launch;
static void run_launch(void* argument) {
  Launch* l = argument; const char* name = l->function->name; void *x = (void*)l->a, *y = (void*)l->b, *z = (void*)l->c;
#define SUM(T) for (uint64_t i = 0; i < l->n; i++) ((T*)x)[i] = ((T*)y)[i] + ((T*)z)[i]
  if (!strcmp(name, "sum_f32")) SUM(float);
  else if (!strcmp(name, "sum_f64")) SUM(double);
  else if (!strcmp(name, "sum_i32")) SUM(uint32_t);
  else if (!strcmp(name, "sum_i64")) SUM(uint64_t);
  else if (!strcmp(name, "sum_u8")) SUM(uint8_t);
  else if (!strcmp(name, "divide_f32")) for (uint64_t i = 0; i < l->n; i++) ((float*)x)[i] /= l->f;
  else if (!strcmp(name, "divide_f64")) for (uint64_t i = 0; i < l->n; i++) ((double*)x)[i] /= l->d;
  free(l);
}
int cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream* s, void** p, void** extra) {
  NEED_CONTEXT; (void)shared; (void)extra;
  if (!gx || gy != 1 || gz != 1 || !bx || by != 1 || bz != 1) return 1;
  Launch* l = calloc(1, sizeof *l); l->function = f; l->a = *(uint64_t*)p[0];
  if (!strncmp(f->name, "sum", 3)) { l->b = *(uint64_t*)p[1]; l->c = *(uint64_t*)p[2]; l->n = *(uint64_t*)p[3]; }
  else { if (!strcmp(f->name, "divide_f32")) l->f = *(float*)p[1]; else l->d = *(double*)p[1]; l->n = *(uint64_t*)p[2]; }
  count(LAUNCHES); push(s, run_launch, l); return 0;
}

/* ================================ NCCL ================================ */
enum { OK, CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS };
#define RANKS 64
/* An operation of all ranks, or a message of two: who has come, with which memory. */
typedef struct Meeting { uint64_t number; int kind, came, left; const void* input[RANKS]; void* output[RANKS]; size_t n[RANKS]; struct Meeting* next; } Meeting;
typedef struct Message { int from, to, taken; const void* data; size_t bytes; struct Message* next; } Message;
typedef struct World { unsigned char id[128]; int size, joined, ended; Meeting* meetings; Message* messages; struct World* next; } World;
typedef struct Comm { World* world; int rank, aborted, finalized, ended, state, tasks, registered, deriving; uint64_t operations; } Comm;
static World* worlds;
static int hung_rank = -1, broken_rank = -1, absent_rank = -1;
/* That rank's operations do nothing until an abort. */
void fake_hang(int rank) { enter(); hung_rank = rank; leave(); }
/* That rank finds an asynchronous error when it next enqueues something. */
void fake_break(int rank) { enter(); broken_rank = rank; leave(); }

/* That rank never joins a group: its initialisation, and so its peers', stays in progress. */
void fake_absent(int rank) { enter(); absent_rank = rank; leave(); }

int ncclGetVersion(int* version) { *version = FAKE_VERSION; return OK; }
const char* ncclGetErrorString(int code) {
  static const char* names[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument", "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
  return code >= 0 && code < 8 ? names[code] : "unknown result code";
}
const char* ncclGetLastError(Comm* c) { return c && c->state == REMOTE_ERROR ? "fake: the peer is gone" : ""; }
int ncclGetUniqueId(unsigned char* id) {
  static int next; enter(); memset(id, 0, 128); int number = ++next; memcpy(id, &number, sizeof number); leave(); return OK;
}
static World* world_locked(const unsigned char* id, int size) {
  for (World* w = worlds; w; w = w->next) if (!memcmp(w->id, id, 128)) return w->size == size ? w : NULL;
  World* w = calloc(1, sizeof *w); memcpy(w->id, id, 128); w->size = size; w->next = worlds; return worlds = w;
}
typedef struct { unsigned char bytes[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking, cga, min, max; const char* net; int share, traffic; } Config;
int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, Config* config) {
  if (depth == 0) return CUDA_ERROR;
  if (rank < 0 || rank >= size || size > RANKS) return INVALID_ARGUMENT;
  if (!config || config->magic != 0xcafebeef || config->size != 48 || config->blocking != 0) return INVALID_ARGUMENT;
  enter();
  World* w = world_locked(id.bytes, size);
  if (!w) { leave(); return INVALID_USAGE; }
  Comm* c = calloc(1, sizeof *c); c->world = w; c->rank = rank; c->state = IN_PROGRESS; w->joined += rank != absent_rank; counters[FORMINGS]++;
  *comm = c; leave(); return IN_PROGRESS;
}
/* Counts a use of what was destroyed or aborted: a fault of the caller. Ended ones are leaked. */
static int valid(Comm* c) { if (c && !c->ended) return 1; count(USES_AFTER_END); return 0; }
int ncclCommGetAsyncError(Comm* c, int* state) {
  if (!valid(c)) return INVALID_ARGUMENT;
  enter();
  if (c->state == IN_PROGRESS && c->finalized && c->tasks == 0 ) c->state = OK;
  if (c->state == IN_PROGRESS && !c->finalized && !c->deriving && c->world->joined == c->world->size) c->state = OK;
  *state = c->state; leave(); return OK;
}
int ncclCommFinalize(Comm* c) {
  if (!valid(c)) return INVALID_ARGUMENT;
  enter(); counters[FINALIZES]++; c->finalized = 1; c->state = IN_PROGRESS; leave(); return IN_PROGRESS;
}
int ncclCommDestroy(Comm* c) {
  if (!valid(c)) return INVALID_ARGUMENT;
  enter(); c->ended = 1; counters[DESTROYS]++; leave(); return OK;
}
int ncclCommAbort(Comm* c) {
  if (!valid(c)) return INVALID_ARGUMENT;
  enter(); c->aborted = 1; c->ended = 1; counters[ABORTS]++; leave(); return OK;
}

static size_t size_of(int type) { static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2}; return sizes[type]; }
static double get16(int type, uint16_t v) {
  if (type == 9) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
  int e = v >> 10 & 31, m = v & 1023; double x = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24); return v >> 15 ? -x : x;
}
/* Exact for the small integers of the tests, truncating else. */
static uint16_t put16(int type, double x) {
  if (type == 9) { float f = (float)x; uint32_t u; memcpy(&u, &f, 4); return u >> 16; }
  uint16_t sign = x < 0 ? 0x8000 : 0; x = fabs(x); if (x == 0) return sign;
  int e; double m = frexp(x, &e); return sign | (uint16_t)((e + 14) << 10 | ((int)(m * 2048) & 1023));
}
static void reduce(void* out, const void** in, int ranks, size_t n, int type, int op) {
#define REDUCE(T) for (size_t i = 0; i < n; i++) { T x = ((const T*)in[0])[i]; \
  for (int r = 1; r < ranks; r++) { T y = ((const T*)in[r])[i]; x = op == 2 ? (y > x ? y : x) : op == 3 ? (y < x ? y : x) : x + y; } \
  ((T*)out)[i] = op == 4 ? x / (T)ranks : x; }
  switch (type) {
    case 1: REDUCE(uint8_t) break;
    case 2: REDUCE(int32_t) break;
    case 4: REDUCE(int64_t) break;
    case 7: REDUCE(float) break;
    case 8: REDUCE(double) break;
    default: for (size_t i = 0; i < n; i++) {
      double x = get16(type, ((const uint16_t*)in[0])[i]);
      for (int r = 1; r < ranks; r++) { double y = get16(type, ((const uint16_t*)in[r])[i]); x = op == 2 ? (y > x ? y : x) : op == 3 ? (y < x ? y : x) : x + y; }
      ((uint16_t*)out)[i] = put16(type, op == 4 ? x / ranks : x);
    }
  }
}

enum { ALL_REDUCE, REDUCE_TO, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECV };
typedef struct Op { Comm* comm; int kind, type, op, peer; const void* in; void* out; size_t n; uint64_t number; Message* message; struct Op* next; } Op;
typedef struct { Op* first; } Ops;

static int stuck_locked(Comm* c) { return c->rank == hung_rank; }
static void run_collective(Op* o) {
  Comm* c = o->comm; World* w = c->world; size_t bytes = o->n * size_of(o->type);
  enter();
  while (stuck_locked(c) && !c->aborted) pause_locked();
  /* Who aborts has not come: its peers wait on. */
  if (c->aborted) { leave(); return; }
  Meeting* m = w->meetings;
  while (m && m->number != o->number) m = m->next;
  if (!m) { m = calloc(1, sizeof *m); m->number = o->number; m->kind = o->kind; m->next = w->meetings; w->meetings = m; }
  /* In place: peers must see what was there before, so everybody brings a copy. */
  size_t brought = o->kind == REDUCE_SCATTER ? bytes * w->size : bytes;
  void* kept = malloc(brought ? brought : 1);
  if (!(o->kind == BROADCAST && c->rank != o->peer)) memcpy(kept, o->in, brought);
  m->input[c->rank] = kept; m->n[c->rank] = o->n; m->came++;
  pthread_cond_broadcast(&changed);
  while (m->came < w->size && !c->aborted) pause_locked();
  if (!c->aborted) {
    const void* in[RANKS];
    for (int r = 0; r < w->size; r++) in[r] = m->input[r];
    switch (o->kind) {
      case ALL_REDUCE: reduce(o->out, in, w->size, o->n, o->type, o->op); break;
      case REDUCE_TO: if (c->rank == o->peer) reduce(o->out, in, w->size, o->n, o->type, o->op); break;
      case REDUCE_SCATTER:
        for (int r = 0; r < w->size; r++) in[r] = (const char*)in[r] + bytes * c->rank;
        reduce(o->out, in, w->size, o->n, o->type, o->op); break;
      case ALL_GATHER: for (int r = 0; r < w->size; r++) memcpy((char*)o->out + bytes * r, in[r], bytes); break;
      case BROADCAST: memcpy(o->out, in[o->peer], bytes); break;
    }
    m->left++;
  }
  leave(); /* meetings and their copies are leaked: a test's process is short */
}
static void post_locked(Op* o) {
  Message* m = calloc(1, sizeof *m); m->from = o->comm->rank; m->to = o->peer; m->bytes = o->n * size_of(o->type);
  m->data = o->in; o->message = m;
  Message** end = &o->comm->world->messages; while (*end) end = &(*end)->next; *end = m;
}
static void take(Op* o) {
  Comm* c = o->comm; enter();
  for (;;) {
    if (c->aborted) break;
    Message* m = stuck_locked(c) ? NULL : c->world->messages;
    while (m && (m->taken || m->from != o->peer || m->to != c->rank)) m = m->next;
    if (m) {
      size_t bytes = o->n * size_of(o->type);
      /* Real NCCL hangs or corrupts here; the fake makes the fault visible. */
      if (m->bytes != bytes) { fprintf(stderr, "fake nccl: a message of %zu bytes meets a receive of %zu\n", m->bytes, bytes); abort(); }
      memcpy(o->out, m->data, bytes); m->taken = 1; break;
    }
    pause_locked();
  }
  leave();
}
/* Collectives of a group in their order, then all its messages at once. */
static void run_ops(void* argument) {
  Ops* ops = argument; Comm* c = ops->first ? ops->first->comm : NULL;
  for (Op* o = ops->first; o; o = o->next) if (o->kind < SEND) run_collective(o);
  enter();
  while (c && stuck_locked(c) && !c->aborted) pause_locked();
  for (Op* o = ops->first; o; o = o->next) if (o->kind == SEND && !c->aborted) post_locked(o);
  leave();
  for (Op* o = ops->first; o; o = o->next) if (o->kind == RECV) take(o);
  enter();
  for (Op* o = ops->first; o; o = o->next)
    if (o->kind == SEND && o->message) while (!o->message->taken && !c->aborted) pause_locked();
  /* A sender that is gone must not leave a message whose memory is freed. */
  for (Op* o = ops->first; o; o = o->next) if (o->kind == SEND && o->message) o->message->taken = 1;
  if (c) c->tasks--;
  leave();
  while (ops->first) { Op* o = ops->first; ops->first = o->next; free(o); }
  free(ops);
}
static __thread int grouped;
static __thread Ops* open_ops;
static __thread Stream* open_stream;
static int flush(void) {
  Ops* ops = open_ops; Stream* s = open_stream; open_ops = NULL;
  if (!ops) return OK;
  enter(); ops->first->comm->tasks++; push_locked(s, run_ops, ops); leave();
  return OK;
}
int ncclGroupStart(void) { count(GROUPS); grouped++; return OK; }
int ncclGroupEnd(void) { if (!grouped) return INVALID_USAGE; return --grouped ? OK : flush(); }
static int add(int kind, const void* in, void* out, size_t n, int type, int op, int peer, Comm* c, Stream* s) {
  if (!valid(c)) return INVALID_ARGUMENT;
  if (type < 0 || type > 9 || op < 0 || op > 4 || peer < 0 || peer >= c->world->size) return INVALID_ARGUMENT;
  if (depth == 0) return CUDA_ERROR;
  if (c->finalized || c->state == IN_PROGRESS) return INVALID_USAGE;
  if (kind >= SEND && peer == c->rank && !grouped) return INVALID_USAGE;
  count(OPERATIONS);
  enter();
  if (c->rank == broken_rank) { c->state = REMOTE_ERROR; broken_rank = -1; leave(); return OK; }
  Op* o = calloc(1, sizeof *o); *o = (Op){c, kind, type, op, peer, in, out, n, 0, NULL, NULL};
  if (kind < SEND) o->number = c->operations++;
  if (!open_ops) open_ops = calloc(1, sizeof *open_ops);
  Op** end = &open_ops->first; while (*end) end = &(*end)->next; *end = o;
  open_stream = s; leave();
  return grouped ? OK : flush();
}
int ncclAllReduce(const void* in, void* out, size_t n, int type, int op, Comm* c, Stream* s) { return add(ALL_REDUCE, in, out, n, type, op, 0, c, s); }
int ncclReduce(const void* in, void* out, size_t n, int type, int op, int root, Comm* c, Stream* s) { return add(REDUCE_TO, in, out, n, type, op, root, c, s); }
int ncclReduceScatter(const void* in, void* out, size_t n, int type, int op, Comm* c, Stream* s) { return add(REDUCE_SCATTER, in, out, n, type, op, 0, c, s); }
int ncclAllGather(const void* in, void* out, size_t n, int type, Comm* c, Stream* s) { return add(ALL_GATHER, in, out, n, type, 0, 0, c, s); }
int ncclBroadcast(const void* in, void* out, size_t n, int type, int root, Comm* c, Stream* s) { return add(BROADCAST, in, out, n, type, 0, root, c, s); }
#ifndef WITHOUT_SEND
int ncclSend(const void* in, size_t n, int type, int to, Comm* c, Stream* s) { return add(SEND, in, NULL, n, type, 0, to, c, s); }
#endif
int ncclRecv(void* out, size_t n, int type, int from, Comm* c, Stream* s) { return add(RECV, NULL, out, n, type, 0, from, c, s); }

#ifndef WITHOUT_OPTIONAL
/* A collective of management: all ranks of a world but `gone` bring two numbers. */
typedef struct Table { World* world; uint64_t number; int came, expected, color[RANKS], key[RANKS], here[RANKS]; struct Table* next; } Table;
static Table* tables;
typedef struct { Comm* parent; Table* table; Comm** place; } Derive;
static void* derive_main(void* argument) {
  Derive* d = argument; Comm* p = d->parent; Table* t = d->table;
  enter();
  while (t->came < t->expected && !p->aborted) pause_locked();
  if (p->aborted) { leave(); free(d); return NULL; }
  Comm* child = NULL;
  if (t->color[p->rank] >= 0) {
    int size = 0, rank = 0;
    for (int r = 0; r < p->world->size; r++) if (t->here[r] && t->color[r] == t->color[p->rank]) {
      size++;
      if (t->key[r] < t->key[p->rank] || (t->key[r] == t->key[p->rank] && r < p->rank)) rank++;
    }
    unsigned char id[128]; memset(id, 0xff, 128); memcpy(id, &t, sizeof t); memcpy(id + 8, &t->color[p->rank], 4);
    child = calloc(1, sizeof *child); child->world = world_locked(id, size); child->rank = rank;
    child->state = IN_PROGRESS; child->world->joined++;
  }
  *d->place = child; p->state = OK; p->deriving = 0;
  leave(); free(d); return NULL;
}
static int derive(Comm* c, int color, int key, int expected, Comm** place) {
  if (!valid(c)) return INVALID_ARGUMENT;
  enter();
  uint64_t number = 1000000 + c->operations++;
  Table* t = tables;
  while (t && (t->world != c->world || t->number != number)) t = t->next;
  if (!t) { t = calloc(1, sizeof *t); t->world = c->world; t->number = number; t->expected = expected; t->next = tables; tables = t; }
  t->color[c->rank] = color; t->key[c->rank] = key; t->here[c->rank] = 1; t->came++;
  c->state = IN_PROGRESS; c->deriving = 1;
  Derive* d = malloc(sizeof *d); *d = (Derive){c, t, place};
  pthread_t thread; pthread_create(&thread, NULL, derive_main, d); pthread_detach(thread);
  leave(); return IN_PROGRESS;
}
int ncclCommSplit(Comm* c, int color, int key, Comm** child, Config* config) { (void)config; return derive(c, color, key, c->world->size, child); }
int ncclCommShrink(Comm* c, int* gone, int n, Comm** child, Config* config, int flags) {
  (void)gone; (void)config;
  if (!valid(c)) return INVALID_ARGUMENT;
  enter(); if (flags) { c->aborted = 1; pthread_cond_broadcast(&changed); while (c->tasks) pause_locked(); c->aborted = 0; }
  /* After a failure ranks need not have made as many calls. */
  c->operations = 1000000; leave();
  return derive(c, 0, c->rank, c->world->size - n, child);
}
int ncclCommRevoke(Comm* c, int flags) {
  if (!valid(c) || flags) return INVALID_ARGUMENT;
  enter(); c->aborted = 1; pthread_cond_broadcast(&changed); while (c->tasks) pause_locked(); c->aborted = 0; leave(); return OK;
}
int ncclCommRegister(Comm* c, void* start, size_t bytes, void** handle) {
  if (!valid(c) || !bytes) return INVALID_ARGUMENT;
  enter(); counters[REGISTERED]++; c->registered++; leave(); *handle = start; return OK;
}
int ncclCommDeregister(Comm* c, void* handle) {
  if (!valid(c) || !handle) return INVALID_ARGUMENT;
  enter(); counters[DEREGISTERED]++; c->registered--; leave(); return OK;
}
#endif
