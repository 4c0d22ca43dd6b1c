// A block of GPU threads on one thread of the processor: each is a fiber that runs until it waits for others. The order changes with every turn, so
// that what is read before it is written shows.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

class Fibers {
 public:
  // Calls f(rank) for all ranks side by side.
  void run(int count, const std::function<void(int)>& f) {
    body_ = &f, fibers_.clear();
    for (int rank = 0; rank < count; ++rank) {
      fibers_.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers_.back();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size(), fiber.context.uc_link = &main_;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::begin), 3, unsigned(self), unsigned(self >> 32), rank);
    }
    for (int left = count, turn = 0; left; ++turn) {
      left = 0;
      for (int i = 0; i < count; ++i) {
        Fiber& fiber = *fibers_[current_ = turn % 2 ? count - 1 - i : i];
        if (fiber.done) continue;
        swapcontext(&main_, &fiber.context);
        left += !fiber.done;
      }
    }
  }
  void yield() { swapcontext(&fibers_[current_]->context, &main_); }

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    bool done = false;
  };

  static void begin(unsigned low, unsigned high, int rank) {
    Fibers& all = *reinterpret_cast<Fibers*>(uintptr_t(high) << 32 | low);
    (*all.body_)(rank);
    all.fibers_[rank]->done = true;
  }

  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t main_;
  int current_ = 0;
};

class Barrier {
 public:
  Barrier(Fibers& fibers, int count) : fibers_(fibers), count_(count) {}
  void wait() {
    const long turn = turn_;
    if (++waiting_ == count_)
      waiting_ = 0, ++turn_;
    else
      while (turn_ == turn) fibers_.yield();
  }
  long turns() const { return turn_; }

 private:
  Fibers& fibers_;
  int count_, waiting_ = 0;
  long turn_ = 0;
};
