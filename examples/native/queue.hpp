// A bounded queue in front of work that should not all be done at once.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>

/// Lets some work at once, and some more wait for that, in order.
class Queue {
  public:
    using Turn = std::unique_ptr<Queue, void (*)(Queue *)>;

    Queue(std::size_t working, std::size_t waiting) : working_(working), waiting_(waiting) {}

    /// Wait for a turn, which lasts as long as what is returned. Null: too many wait already, or the queue is closed.
    Turn enter() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (closed_ || entered_ - left_ >= working_ + waiting_) {
            return {nullptr, leave};
        }
        const std::size_t number = entered_++;
        changed_.wait(lock, [&] { return closed_ || number < left_ + working_; });
        Turn turn(this, leave);
        const bool refused = closed_;
        lock.unlock(); // which `leave` takes
        return refused ? Turn(nullptr, leave) : std::move(turn);
    }

    /// Refuse whoever waits or comes, and wait until all turns have ended.
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        changed_.notify_all();
        changed_.wait(lock, [&] { return entered_ == left_; });
    }

  private:
    static void leave(Queue *queue) {
        const std::lock_guard<std::mutex> lock(queue->mutex_);
        ++queue->left_;
        queue->changed_.notify_all();
    }

    const std::size_t working_, waiting_;
    std::size_t entered_ = 0, left_ = 0;
    bool closed_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
};
